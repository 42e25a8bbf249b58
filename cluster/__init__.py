"""Cluster descriptions that ship with worldlm_ray."""
