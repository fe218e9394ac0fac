import sys

from fastpref.cli.main import main

sys.exit(main())
