"""The Ray backend: thin actors around the core of worldlm_ray.

shared.py            the run's clock, and messages whose buffers travel by reference
inner.py             what a federation and the world have in common: one node state machine, driven by calls
node_checkpoints.py  its checkpoints, written beside
node_records.py      its records and its audit trail
federation.py        an inner node with a parent
world.py             the root
leaf.py              what every leaf is, in its own process or not: its state and its messages
client.py            a leaf with its own process: pulls, trains, pushes
client_pool.py       many leaves in one process
drivers.py           takes the steps of the protocol: a thread that waits, or an event loop
plans.py             how a plan travels to the actors
gateway.py           a border's end in the world's cluster: the server for members
gateway_node.py      the node behind it
parent_proxy.py      a border's end in a member's cluster: what stands for the parent there
zero/                a leaf whose model several workers train
recorder.py          the single writer of the run folder

The classes are plain Python; `worldlm_ray.launch` makes actors of them.
"""
