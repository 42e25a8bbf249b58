"""The presets that ship with worldlm_ray: `worldlm train quickstart` reads quickstart.yaml from here."""
