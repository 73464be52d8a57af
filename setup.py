"Every field of the package comes from settings.ini, the file that nbdev reads too."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
wants = {
    key.removesuffix("requirements").rstrip("_"): settings[key].split("\n")[1:]
    for key in settings
    if key.endswith("requirements")
}
course = wants["course"] + wants["sharing"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="MIT",
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']}",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=[settings["lib_path"] + "*"]),
    package_data={
        "llm_course": [
            "configs/*.json",
            "stories/*.txt",
            "stories/shapes/*.txt",
            "tasks/*",
            "templates/*",
        ]
    },
    install_requires=wants[""],
    extras_require={
        "sharing": wants["sharing"],
        "course": course,
        "dev": course + wants["ecosystem"] + wants["dev"],
    },
    entry_points={
        "console_scripts": [settings["console_scripts"]],
        "nbdev": ["llm_course=llm_course._modidx:d"],
    },
)
