"""What TensorBoard opens with: the order of the charts, how many runs there are, and the texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.worlds import client
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.custom_scalar import layout_pb2

from worldlm_ray.config.schema import BudgetConfig
from worldlm_ray.plan import rundir
from worldlm_ray.plan.plan import Plan
from worldlm_ray.records import (
    AggregationRecord,
    MergeRecord,
    PullRecord,
    PushRecord,
    Record,
    RoundRecord,
    StartRecord,
    VerdictRecord,
)
from worldlm_ray.simulation.simulator import simulate
from worldlm_ray.tracking import charts, curves, run_texts
from worldlm_ray.tracking.charts import BEST, CHARTS, MAX_LINES, MEAN, WORST, charts_of
from worldlm_ray.tracking.tracker import Tracker

SELECTED_BY_DEFAULT = 40
"""TensorBoard selects no run where there are more (2.20 and 2.21)."""
OPEN_GROUPS = 2
"""Groups of TIME SERIES that are open when the page is."""
EXTRA_RUNS = 3
"""The lines of all clients together."""


def world(nodes: int) -> dict[str, str]:
    """A world of so many nodes: four federations, and clients in them in turn."""
    federations = [f"world/fed-{number}" for number in range(4 if nodes > 10 else 2)]
    kinds = {"world": "world", **dict.fromkeys(federations, "federation")}
    for number in range(nodes - len(kinds)):
        kinds[f"{federations[number % len(federations)]}/client-{number:04d}"] = "client"
    return kinds


def life(client: str, *, tokens: int, loss: float) -> list[Record]:
    """A client ends a round, and its federation takes the update."""
    parent, now_s, seq = client.rpartition("/")[0], tokens / 10, tokens // 100
    return [
        RoundRecord(
            node=client,
            now_s=now_s,
            round=seq,
            steps=tokens // 10,
            tokens=tokens,
            train_loss=loss,
            loss=loss,
            perplexity_per_token=None,
            learning_rate=0.001,
            tokens_per_s=50.0,
            busy_fraction=0.9,
        ),
        PushRecord(node=client, now_s=now_s, bytes=8),
        VerdictRecord(
            node=parent,
            now_s=now_s,
            sender=client,
            seq=seq,
            base_version=0,
            version=seq,
            tau=seq,
            verdict="accepted",
            bytes=8,
        ),
        AggregationRecord(
            node=parent,
            now_s=now_s,
            version=seq,
            tokens=100,
            total_tokens=tokens,
            contributors=(client,),
            step_norm=0.5,
        ),
        PullRecord(node=client, now_s=now_s, version=seq, bytes=8),
        MergeRecord(node=client, now_s=now_s, version=seq, m=1.0),
    ]


def train(folder: Path, kinds: dict[str, str], *, rounds: int = 2) -> None:
    """A run in which the k-th client's loss is 1 + k / 100 at the end. No more than 300 clients train."""
    run = Tracker(folder, kinds=kinds, hparams={}, budget=BudgetConfig(rounds=rounds))
    clients = [path for path, kind in kinds.items() if kind == "client"][:300]
    for path in clients:
        run.record(StartRecord(node=path, now_s=0.0, loss=5.0, perplexity_per_token=None, heldout_bytes=100))
    for seq in range(1, rounds + 1):
        for number, path in enumerate(clients):
            run.record(*life(path, tokens=100 * seq, loss=1.0 + number / 100 + rounds - seq))
    run.close()


def read(folder: Path) -> EventMultiplexer:
    """What TensorBoard finds below a folder."""
    return EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(folder)).Reload()


def scalars(found: EventMultiplexer) -> set[str]:
    """All tags of charts."""
    return {tag for tags in found.Runs().values() for tag in tags["scalars"]}


def groups(tags: set[str]) -> list[str]:
    """Groups of TIME SERIES as TensorBoard sorts them."""
    return sorted({tag.split("/")[0] for tag in tags})


@pytest.mark.parametrize("nodes", [7, 40, 200])
def test_the_first_screen_is_loss_by_tokens_and_loss_by_time(tmp_path: Path, nodes: int) -> None:
    train(tmp_path, world(nodes))
    tags = scalars(read(tmp_path / "tensorboard"))
    order = groups(tags)
    assert order[:OPEN_GROUPS] == ["1 loss in nats per byte, by tokens", "2 loss in nats per byte, by seconds"]
    assert order[2:5] == ["3 staleness", "4 versions", "5 throughput"]
    for group in order[:OPEN_GROUPS]:
        cards = sorted(tag.partition("/")[2] for tag in tags if tag.startswith(group))
        assert cards[0] == "1 clients, own models"
        assert cards[-1] == "3 mean of the clients below"
        assert len(cards) <= 12, "TensorBoard shows twelve cards of a group at a time"


@pytest.mark.parametrize("nodes", [7, 12, 13, 40, 200, 2_000])
def test_three_worlds_of_any_size_stay_selected(tmp_path: Path, nodes: int) -> None:
    train(tmp_path, world(nodes), rounds=1)
    runs = read(tmp_path / "tensorboard").Runs()
    assert len(runs) <= MAX_LINES <= SELECTED_BY_DEFAULT / 3
    if nodes <= MAX_LINES:
        assert set(runs) == set(world(nodes))
    else:
        assert {MEAN, BEST, WORST, "world", "world/fed-0", "world/fed-3"} <= set(runs)
        assert not any("client-" in run for run in runs)


def test_a_world_in_which_every_client_has_a_line_gathers_nothing_for_all_of_them(tmp_path: Path) -> None:
    run = Tracker(tmp_path, kinds=world(7), hparams={}, budget=BudgetConfig(rounds=9))
    for seq in range(1, 9):
        run.record(*life("world/fed-0/client-0000", tokens=100 * seq, loss=2.0))
    run.close()
    assert {line["node"] for line in curves.read(tmp_path)} == {"world", "world/fed-0", "world/fed-0/client-0000"}


def test_many_federations_leave_room_for_the_lines_of_all_clients() -> None:
    kinds = {"world": "world"}
    for number in range(50):
        kinds |= {f"world/fed-{number}": "federation", f"world/fed-{number}/a": "client"}
    lines = charts.Lines(kinds)
    shown = [path for path in kinds if path in lines]
    assert shown == ["world", *(f"world/fed-{number}" for number in range(charts.MAX_INNER - 1))]
    assert len(shown) + EXTRA_RUNS <= MAX_LINES


def test_all_clients_together_are_their_mean_the_best_and_the_worst(tmp_path: Path) -> None:
    kinds = world(40)
    train(tmp_path, kinds)
    found = read(tmp_path / "tensorboard")
    by_tokens = charts_of("loss", "client")[0].tag
    last = {run: found.Scalars(run, by_tokens)[-1] for run in (MEAN, BEST, WORST)}
    clients = [path for path, kind in kinds.items() if kind == "client"]
    assert last[BEST].value == pytest.approx(1.0)
    assert last[WORST].value == pytest.approx(1.0 + (len(clients) - 1) / 100)
    assert last[MEAN].value == pytest.approx(1.0 + (len(clients) - 1) / 200)
    assert {event.step for event in last.values()} == {200}, "tokens of one client, as in the chart of single clients"
    each = f"{charts.EACH}/{clients[-1]}"
    assert [event.step for event in found.Scalars("world", each)] == [0, 100, 200]
    assert charts_of("loss", "client")[0].tag not in found.Runs()["world"]["scalars"]


def test_the_layout_has_charts_that_exist_and_no_others(tmp_path: Path) -> None:
    train(tmp_path, world(40))
    found = read(tmp_path / "tensorboard")
    newest = max(found.Tensors("world", "custom_scalars__config__"), key=lambda event: event.step)
    layout = layout_pb2.Layout.FromString(newest.tensor_proto.string_val[0])
    titles = {chart.title for category in layout.category for chart in category.chart}
    tags = scalars(found)
    known = {chart.tag: chart for each in CHARTS.values() for chart in each}
    exist = {tag if tag in known else tag.split("/")[0] for tag in tags}
    assert titles == {known[tag].title for tag in exist if known[tag].category}
    assert "Privacy spent (epsilon)" not in titles
    assert "Updates refused per edge and reason" not in titles


def test_no_tag_has_a_bracket_and_no_two_charts_have_one_tag() -> None:
    tags = [chart.tag for each in CHARTS.values() for chart in each]
    assert len(tags) == len(set(tags))
    assert not [tag for tag in [*tags, charts.HISTOGRAM] if set(tag) & set("()[]{}")]
    assert charts_of("refused/a:b (c)", "client")[0].tag.endswith(", a_b__c_")
    assert charts_of("unheard of", "client") == ()


def test_a_resumed_run_goes_on_in_the_same_charts(tmp_path: Path) -> None:
    train(tmp_path, world(7), rounds=1)
    before = scalars(read(tmp_path / "tensorboard"))
    train(tmp_path, world(7), rounds=2)
    found = read(tmp_path / "tensorboard")
    assert scalars(found) == before
    steps = [event.step for event in found.Scalars("world/fed-0/client-0000", charts_of("loss", "client")[0].tag)]
    assert sorted(steps)[-1] == 200


def test_texts_hold_the_configuration_the_tree_and_samples(tiny: Callable[..., Plan]) -> None:
    plan = rundir.create(tiny(name="europe", budget={"rounds": 2}))
    simulate(plan)
    found = read(plan.run_dir / "tensorboard")
    tags = {tag for tag, _ in found.PluginRunToTagToContent("text")["world"].items()}
    clients = [path for path, kind in plan.kinds.items() if kind == "client"]
    assert tags == {"1 configuration", "2 tree", *(f"3 samples/{path}" for path in clients)}

    def text(tag: str) -> str:
        [event] = found.Tensors("world", tag)
        return str(event.tensor_proto.string_val[0].decode())

    assert "    name: europe\n" in text("1 configuration")
    tree = text("2 tree").splitlines()
    rows = [line for line in tree if line.startswith("|")][2:]
    assert len(rows) == len(plan.kinds)
    assert all(path.rpartition("/")[2] in row for path, row in zip(plan.kinds, rows, strict=True))
    assert "client" in rows[-1]
    [sample] = found.Tensors("world", f"3 samples/{clients[0]}")
    assert sample.step == 2
    assert sample.tensor_proto.string_val[0]


def test_a_private_client_shows_no_sample(tiny: Callable[..., Plan], tmp_path: Path) -> None:
    private = {"unit": "record", "noise_multiplier": 1.0, "target_epsilon": 50.0, "delta": 1e-4}
    children = [client("a", tmp_path, 1), client("b", tmp_path, 2, privacy=private)]
    plan = rundir.create(tiny(children, budget={"rounds": 1}))
    simulate(plan)
    tags = read(plan.run_dir / "tensorboard").PluginRunToTagToContent("text")["world"]
    assert "3 samples/world/a" in tags
    assert "3 samples/world/b" not in tags


def test_a_large_tree_says_what_it_leaves_out(tiny: Callable[..., Plan]) -> None:
    many = {"client": "phone", "copies": 1_000}
    text = run_texts.introduction(tiny([many], simulation={"train": False}))["2 tree"]
    assert text.count("\n| ") <= run_texts.MAX_ROWS + 2
    assert f"{1_001 - run_texts.MAX_ROWS:,} more nodes" in text


def test_a_text_ends_neither_its_cell_nor_its_quotation() -> None:
    assert run_texts.cell("a | b\n`c` <script>") == "a &#124; b 'c' &lt;script>"
    assert run_texts.quoted("```\n# no heading") == "    ```\n    # no heading\n"
