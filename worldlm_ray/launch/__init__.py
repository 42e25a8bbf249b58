"""Run a plan on Ray: start the actors of the tree, watch them, gather the result.

The only folder of the package that imports Ray. It makes actors of the plain classes in `actors/`, each of which finds
its parent by name; after that they talk without it, and Ray restarts actors that die. This process then only watches:
it draws the progress, passes on a wish to stop, and measures the models at the end. It may die: on a cluster that
another process started the run goes on, and `worldlm train --resume` finds it.

    cluster     connect to Ray or start it; what fits
    reach       whether a cluster answers at an address, within seconds
    private/    Ray's private interfaces
    cluster_file  a description for `ray up`, checked
    preflight   what machines must have: looked at before a run begins
    run         the life of a run: create or find the actors, watch, measure
    create      make the actors of a run, or find those of one that lives
    watch       watch a run until it is over
    calls       calls of actors that the user may interrupt, and their errors
    monitor     says which actors die, and which have not come up yet
    members     clients join and nodes leave while the run goes on
"""

from worldlm_ray.launch.members import join, leave
from worldlm_ray.launch.run import train

__all__ = ["join", "leave", "train"]
