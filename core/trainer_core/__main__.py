"""``python -m trainer_core`` is the command ``trainer``, for the Python that it is called with."""

from trainer_core.cli.main import main

if __name__ == "__main__":
    main()
