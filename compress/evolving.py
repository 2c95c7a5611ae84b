"""The verbs that discover proxies: measure configurations of a model, and evolve a formula that ranks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress import machine, models, pipeline
from compress.calib.files import Source
from compress.errors import CompressError, refuse
from compress.job import Job
from compress.mixed.choices import numbers
from compress.mixed.request import default_library
from compress.progress import Track, silent
from compress.proxies import bench as stored
from compress.proxies.bench import SUFFIX, Bench
from compress.proxies.evolution import Settings
from compress.proxies.measuring import Wanted
from compress.proxies.proxy import Proxy
from compress.proxies.searching import searched
from compress.spec import BITS, LayerSpec, Scheme

BANDS = 10


def make_bench(
    model: str | Path | None = None,
    *,
    out: str | Path,
    configurations: int = 200,
    bits: str | Sequence[int] = BITS,
    group_size: int = 128,
    library: str | Path | None = None,
    calib: Source | None = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    skip: Sequence[str] = (),
    track: Track = silent,
) -> Bench:
    """Measure what configurations of a model lose, and write them to a file of the model's name in the folder `out`.

    Configurations take one of `bits` for every layer, and are spread evenly over ten sizes. Solved layers are kept in `library`,
    as those of `search`. A bench that is there is read; a run that was interrupted goes on. Raises CompressError.
    """
    source, folder = models.resolve(model), Path(out)
    if configurations < BANDS or configurations % BANDS:
        raise CompressError(f"--configurations is {configurations}; it is a multiple of {BANDS}, as many of each size.")
    if folder.is_file():
        raise CompressError(f"-o {folder} is a file; give a folder for benches.")
    options = tuple(LayerSpec(Scheme(width, group_size)) for width in numbers(bits, "--bits"))
    job = Job(
        source=source,
        out=folder,
        skip=skip,
        judged=True,
        calib=calib,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        dtype=dtype,
        track=track,
    )
    wanted = Wanted(options, Path(library or default_library()), configurations, BANDS, seed=seed)
    return pipeline.find_bench(job, models.short_name(model), wanted)


def evolve(
    sources: Sequence[str | Path] = (),
    *,
    out: str | Path = "proxy.json",
    generations: int = Settings.generations,
    population: int = Settings.population,
    seed: int = 0,
    workers: int | None = None,
    benches: str | Path | None = None,
    calib: Source | None = None,
    samples: int = 128,
    track: Track = silent,
) -> Proxy:
    """Evolve a formula that ranks the configurations of benches, and write it to `out` with the record of its search.

    `sources` are files that `make_bench` wrote, or models, whose benches are made in `benches` first (by default in the user's
    cache) with `calib` and `samples`; none is the embedded reference. What fits several benches is more likely to fit other
    models. The result does not depend on `workers`, the processes, by default one per core. A search that was interrupted goes
    on. Raises CompressError.
    """
    folder = Path(benches or default_library().with_name("benches"))
    wanted: Sequence[str | Path | None] = sources or [None]
    if all(str(source).endswith(SUFFIX) for source in wanted):
        measuring = {"--benches": benches is not None, "--calib": calib is not None, "--samples": samples != Job.samples}
        refuse(measuring, "All of these were measured already")
    found = [
        stored.load(Path(source))
        if source is not None and str(source).endswith(SUFFIX)
        else make_bench(source, out=folder, calib=calib, samples=samples, seed=seed, track=track)
        for source in wanted
    ]
    settings = Settings(generations, population, seed)
    return searched(found, settings, Path(out), machine.cores() if workers is None else workers, track)
