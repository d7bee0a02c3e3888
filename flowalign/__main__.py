"""``python -m flowalign`` is the ``flowalign`` command."""

from flowalign.cli import main

if __name__ == "__main__":
    main()
