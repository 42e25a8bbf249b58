"""The Ray backend: thin actors around the core of worldlm_ray.

shared.py       the run's clock, and messages whose buffers travel by reference
inner.py        what a federation and the world have in common: one node state machine, driven by calls
federation.py   an inner node with a parent
world.py        the root
leaf.py         what every leaf is, in a process of its own or not: its state and its words
client.py       a leaf with a process of its own: pulls, trains, pushes
host.py         many leaves in one process
drivers.py      who takes the steps of the protocol: a thread that waits, or an event loop
zero_client.py  a leaf whose model several workers train
zero_worker.py  one of these workers, inside Ray Train
others.py       what the other leaves take of the machines, for the number of these workers
recorder.py     the single writer of the run folder

The classes are plain Python; `worldlm_ray.launch` makes actors of them.
"""
