"""`python -m worldlm_ray`: the `worldlm` command."""

from worldlm_ray.cli.main import main

if __name__ == "__main__":
    main()
