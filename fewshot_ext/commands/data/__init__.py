"""Get image sets and look at them: download the public ones, pack folders of pictures, show what a file holds.

Where a command asks for an image set it takes the path of a packed file or of a folder of pictures, or a name: that of
a packed file in the folder $FEWSHOT_EXT_DATA or ~/.cache/fewshot_ext, without its .npz.
"""

from types import ModuleType

from fewshot_ext.commands.data import download, info, pack

SUMMARY = "download, pack and inspect image sets"
COMMANDS: dict[str, ModuleType] = {"download": download, "pack": pack, "info": info}
