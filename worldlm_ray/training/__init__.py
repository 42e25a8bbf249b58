"""Local training and evaluation of one client's model.

local.py      AdamW over a flat buffer, and held-out loss
schedule.py   the learning rate from the share of the budget that is spent
sampling.py   text from a model
"""
