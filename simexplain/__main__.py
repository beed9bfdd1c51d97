"""``python -m simexplain`` is the command line."""

from simexplain_cli.main import main

if __name__ == "__main__":
    main()
