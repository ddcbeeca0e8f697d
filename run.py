"""Train, analyse and write one run, or with -m a sweep of them: see README.md."""

from lnjac.cli.run import main

if __name__ == "__main__":
    main()
