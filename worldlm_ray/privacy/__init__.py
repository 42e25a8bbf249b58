"""Differential privacy: what a client's updates reveal of its text, bounded, paid for in advance, and written down.

ledger.py       the durable record of what was spent, written before it is spent
accounting.py   epsilon of a history, and the noise that a budget allows
account.py      one client's noise, rate and budget
dp_sgd.py       clipped per-record gradients of a model
"""
