"""``python -m adjointlab`` is the command ``adjointlab``."""

from adjointlab.cli import main

if __name__ == "__main__":
    main()
