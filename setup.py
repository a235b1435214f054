from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1]
    for line in (here / "nnunet_sauron" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# `nnUNetv2_sauron export` writes ONNX and checks it with both engines: Apache-2.0 and MIT, of the Linux Foundation,
# Microsoft and Intel.
deploy = ["onnx>=1.16", "onnxruntime>=1.18", "openvino>=2024.2"]

setup(
    name="nnunet-sauron",
    version=version,
    description="Channel pruning, compression and lean architectures for nnU-Net v2",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # The runtime is a distribution of its own too, for machines without PyTorch: pip install ./runtime
    packages=[
        *find_packages(include=["nnunet_sauron", "nnunet_sauron.*"], exclude=["nnunet_sauron.dataset_conversion"]),
        *(f"nnunet_sauron.{name}" for name in find_packages(include=["dataset_conversion", "dataset_conversion.*"])),
        "nnunet_sauron_runtime",
    ],
    package_dir={
        "nnunet_sauron.dataset_conversion": "dataset_conversion",
        "nnunet_sauron_runtime": "runtime/nnunet_sauron_runtime",
    },
    package_data={"nnunet_sauron": ["py.typed"], "nnunet_sauron.plugin": ["shims/*.py", "planner_shim/*.py"]},
    python_requires=">=3.10",
    install_requires=[
        # What this package extends. The oldest version that passes `.ci/oldest`, as those below.
        "nnunetv2>=2.8.1",
        # nnU-Net brings these today, in versions that fit it, and we import them as well.
        *("numpy", "pandas", "matplotlib", "SimpleITK", "nibabel", "tifffile", "scikit-learn"),
        *("acvl-utils", "dynamic-network-architectures"),
        # As nnU-Net itself asks for, so that pip leaves the user's PyTorch as it is (`.ci/oldest`). MONAI, which
        # has Dice and Hausdorff distances, asks for 2.8: SciPy computes them instead, and tests compare them with
        # MONAI's numbers.
        "torch>=2.1.2",
        # Distances, bootstrap intervals, signed rank tests: BSD.
        "scipy>=1.11.4",
        # Tables and progress bars in the terminal: MIT, widely used, small.
        "rich>=13",
    ],
    extras_require={
        # The dip test, which only `nnUNetv2_sauron clusterability` needs: GPL, so it is for the user to choose.
        "clusterability": ["diptest>=0.8"],
        "deploy": deploy,
        # benchmarks/study reads its grid from YAML, and hands trainings to a cluster with `--cluster`: both MIT.
        "study": ["PyYAML>=6", "submitit>=1.5"],
        "test": [
            "pytest>=8",
            # Tests in two processes, half the time: pytest's own project, MIT.
            "pytest-xdist>=3.7",
            "ruff>=0.9",
            # A test builds the wheel.
            "setuptools>=70.1",
            "diptest>=0.8",
            # The independent judge of which channels belong together, and nothing but a judge: MIT.
            "torch-pruning>=1.6",
            # The study's grids and its jobs.
            "PyYAML>=6",
            "submitit>=1.5",
            *deploy,
        ],
    },
    entry_points={"console_scripts": ["nnUNetv2_sauron = nnunet_sauron.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
