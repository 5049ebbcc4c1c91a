"""`python -m distributed_mnist` is `dmnist`."""

from .cli.main import main

if __name__ == "__main__":
    main()
