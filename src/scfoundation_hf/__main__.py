"""`python -m scfoundation_hf`: the same as the command `scfoundation`."""

from scfoundation_hf.cli import main

if __name__ == "__main__":
    main()
