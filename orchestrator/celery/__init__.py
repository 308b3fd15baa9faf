"""Where the engine meets Celery: the only package below the command line that imports celery or kombu."""
