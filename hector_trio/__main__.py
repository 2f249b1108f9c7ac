"""``python -m hector_trio`` is ``hector``."""

from hector_trio.cli import main

if __name__ == "__main__":
    main()
