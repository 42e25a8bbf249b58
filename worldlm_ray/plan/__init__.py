"""What a run is: its tree, the checked plan, its folder, its members, and faults on purpose."""
