"""The experts of every adapted layer, by the setting `model.lora.experts`; without torch."""

EXPERTS: dict[str, tuple[str, ...]] = {
    "kin": ("own", "federation", "world"),
    "rest": ("own", "rest"),
}
"""Names in the order of a router's outputs. The first is the client's own."""
EXPERT = "expert."
ROUTER = "router."
"""Beginnings of the names of buffers in a trainer's state."""
