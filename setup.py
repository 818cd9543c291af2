"Packaging: everything that can be said in settings.ini is said there; the build adds the papermill templates."
import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(HERE/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
EXTRAS = ["eval", "slurm", "wandb", "fp8", "dev"]


class BuildWithTemplates(build_py):
    "Copy nbs/experiments into the built package, so that an installed peer-ablate has its notebooks"
    def run(self):
        super().run()
        if self.editable_mode: return   # a checkout's own nbs/ is found first
        target = Path(self.build_lib)/cfg["lib_name"]/"experiments"
        target.mkdir(parents=True, exist_ok=True)
        for notebook in sorted((HERE/"nbs"/"experiments").glob("*.ipynb")): shutil.copy(notebook, target)


def words(key): return shlex.split(cfg.get(key, ""))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={name: words(name + "_requirements") for name in EXTRAS},
    entry_points={"console_scripts": words("console_scripts"),
                  "nbdev": [f'{cfg["lib_name"]}={cfg["lib_name"]}._modidx:d']},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    cmdclass={"build_py": BuildWithTemplates},
    zip_safe=False,
)
