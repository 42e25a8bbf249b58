"""Local training and evaluation of one client's model.

trainer.py            what a client asks of whatever trains its model
local.py              AdamW over a flat buffer, on one device of this process
zero.py               one worker of a model that DeepSpeed shards over several
deepspeed_config.py   DeepSpeed's configuration from ours, and ZeRO's arithmetic of memory
schedule.py           the learning rate from the share of the budget that is spent
sampling.py           text from a model
"""
