"""Other libraries' loops and folders: their objects go in, a pipeline does the work behind their own names.

Each file needs the library that it is for, so import it by name: ``pipeengine.integrations.huggingface``.
"""

__all__: list[str] = []
