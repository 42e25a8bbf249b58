"""WorldLM as a runtime: language models trained across federations of federations, asynchronously, on Ray.

Two calls do what the command line does, each on a plan:

    plan = rundir.create(plan.make_plan(load("quickstart")))
    launch.train(plan)          actors on Ray, wall clock
    simulate.simulate(plan)     one process, virtual clock

Nothing is imported here: an inner node must not load torch, and the core must not load Ray.
"""

__version__ = "0.1.0"
