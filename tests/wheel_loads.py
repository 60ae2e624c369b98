"""Run by hand and by the wheels' workflow: the installed fastdiff._C loads without PyTorch, and is of the sources here.

python tests/wheel_loads.py [FOLDER]    the folder that fastdiff is in; that of the running Python's packages
"""

import importlib.util
import runpy
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
folder = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("platlib")) / "fastdiff"
built, extension = (runpy.run_path(str(path)) for path in (folder / "_built.py", ROOT / "fastdiff" / "extension.py"))
assert not built["MISSING"], built["MISSING"]
(path,) = folder.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
spec = importlib.util.spec_from_file_location("fastdiff._C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.sources == built["SOURCES"] == extension["digest"](ROOT), (module.sources, built["SOURCES"])
assert "torch" not in sys.modules
print(f"{path.name}: sources {module.sources}, {module.simd()} of {', '.join(module.simd_variants())}")
