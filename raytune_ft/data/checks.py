"""What is refused of a job's data before any training, and what its author should know of it."""

from collections.abc import Iterator
from dataclasses import replace

from raytune_ft.data.counts import NO_LEARNED_TOKENS, Counts, DataCounts, Survey, count_sources
from raytune_ft.errors import DataError
from raytune_ft.spec import DataSpec

_SHOWN_PLACES = 3
_TELLING_RECORDS = 100
"""A sample of fewer records says nothing of the share of malformed ones."""
_MANY_TOO_LONG = 0.5
"""A larger share of a source's examples that is dropped is told of."""


def check_counts(survey: Survey, data: DataSpec, quarantine: str | None) -> DataCounts:
    """Refuse data that nothing could be learned from, before anything is spent on it.

    Args:
        survey: what was read.
        data: the job's data section.
        quarantine: where the bad records were written, for the message.

    Raises:
        DataError: a source is empty, too many records are malformed or too many examples too long, of all
            data or of a source, or no training example is left.
    """
    total = survey.counts()
    _check_files(survey, data)
    counts = counted(survey, data)
    masked = sum(report.reasons.get(NO_LEARNED_TOKENS, 0) for report in survey.read())
    if not survey.complete and total.records < _TELLING_RECORDS:
        # The rest is judged as it is read.
        return counts
    if masked == total.records:
        raise DataError(
            f"data: all labels are masked: none of the {masked} records{survey.extent()} has a learned "
            "token; look at the completions, the template and the tokenizer with `raytune-ft data`"
        )
    if total.bad > data.max_bad_fraction * total.records:
        raise DataError(_too_many_bad(survey, data, quarantine, None, total))
    if total.train == 0:
        raise DataError(_nothing_left(survey, total, data))
    for source in range(len(data.sources)):
        _check_source(survey, data, quarantine, source)
    return counts


def counted(survey: Survey, data: DataSpec) -> DataCounts:
    """Counts of a job's data with what its author should know of it."""
    counts = count_sources(survey, data)
    return replace(counts, notices=tuple(_notices(survey, counts, data)))


def _notices(survey: Survey, counts: DataCounts, data: DataSpec) -> Iterator[str]:
    yield from survey.notices
    about = "about " if counts.estimated else ""
    for at, (source, found) in enumerate(zip(data.sources, counts.sources, strict=True)):
        place = f"data.sources[{at}] ({source.uri})"
        if found.records and not found.train:
            yield (
                f"{place} gives no training example: of {about}{found.records:,} records {found.bad:,} are "
                f"malformed, and {found.dropped:,} examples are longer than data.max_tokens"
            )
        elif found.dropped > _MANY_TOO_LONG * found.examples:
            yield f"{place}: {_too_long(survey, data, at, found.dropped, found.examples, about)}"
        if found.left_out:
            names = ", ".join(f"{name} ({count:,} records)" for name, count in found.left_out.items())
            yield f"{place}: the model does not see {names}"
        if found.ends < found.learned_answers:
            missing = found.learned_answers - found.ends
            yield (
                f"{place}: {about}{missing:,} of {found.learned_answers:,} learned answers have no end: the "
                "tokenizer has no EOS token, and the model will not learn to stop"
            )
    total = counts.total
    for split, share in (("validation", data.split.validation), ("test", data.split.test)):
        if share and total.train and not getattr(total, split):
            yield (
                f"data.split.{split} = {share:g} of {about}{total.train:,} examples leaves none; nothing is "
                "measured there; raise it, give more data, or set it to 0"
            )


def _too_long(
    survey: Survey, data: DataSpec, source: int | None, dropped: int, examples: int, about: str = ""
) -> str:
    longest = max((report.longest for report in survey.read(source)), default=0)
    remedy = "raise data.max_tokens" + (", or set data.too_long: cut" if data.too_long == "drop" else "")
    return (
        f"{about}{dropped:,} of {examples:,} examples are longer than data.max_tokens = {data.max_tokens}, "
        f"and dropped; the longest has {longest:,} tokens; {remedy}"
    )


def _check_source(survey: Survey, data: DataSpec, quarantine: str | None, at: int) -> None:
    found = survey.counts(at)
    if survey.extent(at) and found.records < _TELLING_RECORDS:
        return
    if found.bad > data.max_bad_fraction * found.records:
        raise DataError(_too_many_bad(survey, data, quarantine, at, found))
    if found.dropped > data.max_too_long_fraction * found.examples:
        raise DataError(
            f"data.sources[{at}].uri = {data.sources[at].uri}: "
            f"{_too_long(survey, data, at, found.dropped, found.examples)}, or raise "
            f"data.max_too_long_fraction = {data.max_too_long_fraction:g}"
        )


def _check_files(survey: Survey, data: DataSpec) -> None:
    for at, source in enumerate(data.sources):
        # Of a source that was not read as a whole, the rest may have records.
        unread = survey.extent(at) and any(
            survey.windows[number].size_bytes for number in survey.numbers.get(at, ())
        )
        if unread or any(report.counts.records for report in survey.read(at)):
            continue
        objects = sum(survey.windows[number].part == 0 for number in survey.numbers.get(at, ()))
        files = "the file is empty" if objects == 1 else f"all {objects} files are empty"
        raise DataError(f"data.sources[{at}].uri = {source.uri}: no records; {files}")


def _too_many_bad(
    survey: Survey, data: DataSpec, quarantine: str | None, source: int | None, found: Counts
) -> str:
    bad = [bad for report in survey.read(source) for bad in report.bad][:_SHOWN_PLACES]
    place = "data" if source is None else f"data.sources[{source}].uri = {data.sources[source].uri}"
    lines = [
        f"{place}: {found.bad} of {found.records} records{survey.extent(source)} are malformed "
        f"({found.bad / found.records:.2%}), and data.max_bad_fraction is {data.max_bad_fraction:g}; "
        "the first of them:",
        *(f"  {record.place}: {record.reason}" for record in bad),
    ]
    return "\n".join([*lines, f"  all are in {quarantine}"] if quarantine else lines)


def _nothing_left(survey: Survey, total: Counts, data: DataSpec) -> str:
    records = f"{total.records} records{survey.extent()}"
    if total.dropped and not total.validation + total.test:
        longest = max(report.longest for report in survey.read())
        remedy = "raise data.max_tokens" + (", or set data.too_long: cut" if data.too_long == "drop" else "")
        return (
            f"data: no training example is left: {total.dropped} of {records} are longer than "
            f"data.max_tokens = {data.max_tokens}, the longest has {longest} tokens; {remedy}"
        )
    return (
        f"data: no training example is left: of {records} {total.bad} are malformed, "
        f"{total.dropped} longer than data.max_tokens = {data.max_tokens}, {total.validation} in the "
        f"validation split and {total.test} in the test split; give more data or a smaller data.split"
    )
