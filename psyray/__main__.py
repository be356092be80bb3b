"""`python -m psyray` is the command `psyray`: for where only Python is known, such as the entrypoint of a Ray job."""

from psyray.cli import main

if __name__ == "__main__":
    main()
