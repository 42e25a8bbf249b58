"""Local training and evaluation of one client's model.

trainer.py            the interface of a trainer, by which a client trains its model
local.py              AdamW over a flat buffer, on one device of this process
zero.py               one worker of a model that DeepSpeed shards over several
spans.py              a layout in parts of one layer, for such a worker
deepspeed_config.py   DeepSpeed's configuration from ours, and the memory of each ZeRO stage
schedule.py           the learning rate by the fraction of the budget that is spent
sampling.py           text from a model
"""
