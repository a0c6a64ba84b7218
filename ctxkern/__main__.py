import sys

from ctxkern.cli import main

if __name__ == "__main__":
    sys.exit(main())
