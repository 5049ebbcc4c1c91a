"""`python -m distributed_mnist` is `dmnist`."""

from .cli import main

if __name__ == "__main__":
    main()
