"""A client whose model several workers train with DeepSpeed; the rest of the world notices nothing of it.

client      the client's actor: its process holds no model, only what is exchanged
trainer     the client's trainer: turns what the client asks into tasks
tasks       the queue where workers fetch tasks and leave results
train_run   the run of Ray Train that starts the workers and replaces those that die
worker      a worker, inside Ray Train
capacity    keeps the capacity of the world's other clients out of Ray Train's count
"""
