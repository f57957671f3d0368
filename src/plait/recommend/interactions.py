"""Tables of interactions and of items -> rows: MovieLens files, CSV and the like with a heading, plain lines."""

from __future__ import annotations

import gzip
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from plait.core.errors import PlaitError
from plait.core.rejects import Reason, RejectKind
from plait.data.files import DAMAGED, TABLE_SUFFIXES, Tree, suffix_of
from plait.data.record import LABEL_NAMES, Rejected, text_fault
from plait.data.stores import open_binary, raise_if_passing, read_bytes
from plait.data.tables import rows
from plait.modalities.descriptor import MediaError
from plait.modalities.media import MEDIA
from plait.recommend.catalogue import Item
from plait.recommend.settings import ItemsRecipe

# What a column may be called: role -> names, in lower case, without what is no letter.
ROLES = {
    "user": "user userid uid customer customerid reviewer reviewerid session sessionid visitorid member memberid "
    "client clientid klant klantnummer klantnr kunde kundennummer kundennr cliente usuario utilisateur "
    "用户 用户id 客户 会员",
    "item": "item itemid iid movieid movie filmid film productid product asin sku article articleid trackid songid "
    "bookid isbn artikel artikelnummer artikelnr produkt produit producto prodotto 商品 商品id 产品 物品 电影",
    "time": "time timestamp ts date datetime unixreviewtime when at created createdat orderdate datum zeit zeitpunkt "
    "tijd fecha 时间 日期 下单时间",
    "weight": "weight rating score overall stars",
    "id": "id item itemid iid movieid filmid productid asin sku articleid trackid songid bookid isbn hexcode",
    "title": "title name itemname productname label",
    "text": "text description overview summary plot abstract",
    "categories": "categories category genres genre group tags keywords",
    "image": "image picture img photo poster imagefilename picturefilename cover filename file",
    "audio": "audio sound audiofilename soundfilename preview",
}
_NAMES = {role: names.split() for role, names in ROLES.items()}
_INTERACTIONS = re.compile(r"(u\.data|ratings\.(dat|csv)|(interactions|events|histories|purchases)\.\w+)(\.gz)?$")
_ITEMS = re.compile(r"(u\.item|movies\.(dat|csv)|(items|products|catalogue|catalog)\.\w+)(\.gz)?$")
_MOST = 0.9  # of the lines decide what a file is
LINES_SUFFIXES = ("", ".txt", ".dat", ".data", ".inter")  # of files of lines, `.gz` after them or not
_BEGINNING = 1 << 18  # bytes of a file that say what it holds
_DATE = re.compile(r"(\d{1,2})([./-])(\d{1,2})\2(\d{4})([ T].*)?$")  # 24-11-2026
_YEAR_FIRST = re.compile(r"(\d{4})[./](\d{1,2})[./](\d{1,2})([ T].*)?$")  # 2026/11/24
_SAMPLE = 200  # lines that are looked at for that
_LOOKED_AT, _LEAST_ROWS = 20_000, 20  # rows that say whether a table of any name is one of interactions
_DISTINCT = 0.7  # of the rows at most are other people, or other items, than those before
_WORDS = 4  # that a cell beside them has at most
_GENRES = (
    "unknown|Action|Adventure|Animation|Children's|Comedy|Crime|Documentary|Drama|Fantasy|Film-Noir|Horror|Musical|"
    "Mystery|Romance|Sci-Fi|Thriller|War|Western"
)


@dataclass
class Interaction:
    """One line: somebody chose something."""

    user: str
    item: str
    time: float | None  # seconds since 1970, or whatever the file counts
    weight: float | None


def find(tree: Tree, recipe: ItemsRecipe | None) -> tuple[str, str | None] | None:
    """The tables of interactions and of items among the files of a source; None where it holds no histories.

    Without a recipe, files with the names of such tables count, and a table that is plainly one. Raises PlaitError
    where the recipe asks for histories and there are none.
    """
    wish = recipe or ItemsRecipe()
    first = _named(tree, wish.interactions) if wish.interactions else _only(tree, _INTERACTIONS)
    second = _named(tree, wish.items) if wish.items else _only(tree, _ITEMS)
    if first is None and recipe is not None:
        lines = [name for name in tree.files if name != second and _is_lines(tree, name)]
        tables = [name for name in tree.files if name != second and _is_interactions(tree, name, wish)]
        choices = tables or lines
        if len(choices) != 1:
            raise PlaitError(_no_choice(tree, choices))
        first = choices[0]
    if first is None:
        plain = (_plainly_interactions, _plainly_lines)
        tables = [name for name in tree.files if any(known(tree, name) for known in plain)]
        if len(tables) != 1:
            return None
        first = tables[0]
    if second is None and recipe is not None and recipe.items is None:
        others = [name for name in tree.files if name != first and _is_items(tree, name, wish)]
        second = others[0] if len(others) == 1 else None
    return first, second


def _no_choice(tree: Tree, choices: list[str]) -> str:
    """Why no table of interactions could be chosen, and what to write."""
    if choices:
        return f"There are several tables of interactions: {', '.join(choices[:8])}. Name one: data.items.interactions."
    heads = {name: list(dict.fromkeys(_heads(tree, name))) for name in list(tree.files)[:8]}
    shown = "; ".join(f"{name}{': ' if columns else ''}{', '.join(columns)}" for name, columns in heads.items())
    return (
        f"There is no table of interactions, with columns called as user and item are ({shown}). Say in a recipe which "
        "column is what, and name it with --recipe: data: {items: {columns: {user: NAME, item: NAME, time: NAME}}}. "
        "Plain lines 'user item' in order of time are read too."
    )


def _named(tree: Tree, file_name: str) -> str:
    if file_name in tree.files:
        return file_name
    inside = [name for name in tree.files if name.rpartition("/")[2] == file_name]
    if len(inside) == 1:
        return inside[0]
    raise PlaitError(
        f"{tree.root} has no file '{file_name}', which the recipe names. It has {', '.join(tree.files)[:300]}."
    )


def _only(tree: Tree, pattern: re.Pattern[str]) -> str | None:
    matching = [name for name in tree.files if pattern.fullmatch(name.rpartition("/")[2])]
    return matching[0] if len(matching) == 1 else None


def _heads(tree: Tree, name: str) -> list[str]:
    if suffix_of(name) not in TABLE_SUFFIXES:
        return []
    return [key for _, row in islice(rows(tree, name), 20) if isinstance(row, dict) for key in row]


def _rows_there(tree: Tree, name: str) -> list[str]:
    """`_heads` of a table that is to be used. Raises PlaitError where no row of it can be read."""
    heads = _heads(tree, name)
    if not heads:
        why = next((f": {row}" for _, row in rows(tree, name) if isinstance(row, Reason)), "")
        raise PlaitError(f"{name} has no rows{why}. It needs a line of column names, and rows below it.")
    return heads


def _is_interactions(tree: Tree, name: str, recipe: ItemsRecipe) -> bool:
    heads = _heads(tree, name)
    return bool(_columns(heads, "user", recipe) and _columns(heads, "item", recipe))


def _plainly_interactions(tree: Tree, name: str) -> bool:
    """Whether a table of any name can be nothing else: who chose what, alone or with when or how much, with people and
    items that come again, and neither texts nor files beside them."""
    recipe = ItemsRecipe()
    heads = _heads(tree, name)
    user, item = _columns(heads, "user", recipe), _columns(heads, "item", recipe)
    measures = [*_columns(heads, "time", recipe), *_columns(heads, "weight", recipe)]
    named_labels = any(head.lower() in LABEL_NAMES for head in heads if head not in measures)
    alone = set(heads) == {*user, *item}
    if not (user and item and (measures or alone)) or named_labels:
        return False
    read = [row for _, row in islice(rows(tree, name), _LOOKED_AT) if isinstance(row, dict)]
    if len(read) < _LEAST_ROWS:
        return False
    for column in (*user, *item):
        if len({str(row.get(column)) for row in read}) > _DISTINCT * len(read):
            return False
    others = {head for head in heads if head not in (*user, *item, *measures)}
    cells = [str(row[column]) for row in read for column in others if row.get(column) is not None]
    names = [str(row.get(column)) for row in read for column in (*user, *item)]
    return not (_worded(cells, _WORDS) or _worded(names, 2 * _WORDS) or any(cell in tree.files for cell in cells))


def _worded(cells: list[str], most: int) -> bool:
    """Whether more than a tenth of some cells have more words than that."""
    return sum(len(cell.split()) > most for cell in cells) > (1 - _MOST) * len(cells)


def _plainly_lines(tree: Tree, name: str) -> bool:
    """Whether a text file of any name can be nothing else than lines of ids in order of time: whole numbers alone, as
    `user item`, `user item rating time`, or a user and all items in order, with items that come again."""
    if suffix_of(name) not in LINES_SUFFIXES:
        return False
    lines = _first_lines(tree, name)
    mark = _mark(lines)
    cells = [_cells(line, mark) for line in lines]
    numbers = all(cell.isascii() and cell.isdecimal() for row in cells for cell in row)
    if len(cells) < _LEAST_ROWS or not numbers or any(len(row) < 2 for row in cells):
        return False
    layout = _layout(lines, mark, ItemsRecipe())
    if layout.width is None:
        items = [item for row in cells for item in row[1:]]
        users = [row[0] for row in cells]
        return len(set(users)) == len(users) and len(set(items)) <= _DISTINCT * len(items)
    if len({len(row) for row in cells}) > 1 or (layout.width > 2 and layout.time is None):
        return False  # a table of numbers
    return all(len({row[n] for row in cells}) <= _DISTINCT * len(cells) for n in (layout.user, layout.item))


def _is_items(tree: Tree, name: str, recipe: ItemsRecipe) -> bool:
    heads = _heads(tree, name)
    return bool(_columns(heads, "id", recipe) and not _columns(heads, "user", recipe))


def _is_lines(tree: Tree, name: str) -> bool:
    """Whether a text file holds rows of ids: two or more in nearly each line, with digits in them."""
    if suffix_of(name) not in LINES_SUFFIXES:
        return False
    lines = _first_lines(tree, name)[:51]
    mark = _mark(lines)
    cells = [_cells(line, mark) for line in lines]
    if len(cells) > 1 and _named_cells(cells[0]):
        cells = cells[1:]
    ids = [cell for row in cells for cell in row]
    numbered = sum(bool(re.search(r"\d", cell)) for cell in ids) >= _MOST * len(ids)
    several = sum(len(row) >= 2 for row in cells) >= _MOST * len(cells)
    spaced = sum(" " in cell and _time(cell) is None for cell in ids) > (1 - _MOST) * len(ids)
    return bool(cells) and numbered and several and not spaced


def _columns(heads: list[str], role: str, recipe: ItemsRecipe) -> list[str]:
    """The columns of a role: those that the recipe names, else the first of a usual name."""
    if role in recipe.columns:
        return [name.strip() for name in recipe.columns[role].split(",")]
    # RecBole's headings say the type too: "user_id:token".
    plain = {re.sub(r"[\W\d_]", "", head.lower().partition(":")[0]): head for head in reversed(heads)}
    return next(([plain[name]] for name in _NAMES[role] if name in plain), [])


# --- lines ------------------------------------------------------------------------------------------------------


def _first_lines(tree: Tree, name: str) -> list[str]:
    """The first whole lines of a text file, from its first bytes alone; none of a file that is no text."""
    try:
        raw = open_binary(tree.files[name])
        with gzip.open(raw) if name.lower().endswith(".gz") else raw as file:
            data = file.read(_BEGINNING)
        text = data.decode("utf-8-sig", errors="ignore") if len(data) == _BEGINNING else data.decode("utf-8-sig")
    except (*DAMAGED, UnicodeDecodeError) as error:
        raise_if_passing(error, name)
        return []
    lines = text.splitlines()
    whole = lines[:-1] if len(data) == _BEGINNING else lines
    return [line for line in whole if line.strip()][:_LOOKED_AT]


def _lines(tree: Tree, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a text file that are not blank, numbered from 1: UTF-8, else Latin-1, as MovieLens has it."""
    raw = open_binary(tree.files[name])
    with gzip.open(raw) if name.lower().endswith(".gz") else raw as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    for number, line in enumerate(io.StringIO(text), 1):
        if line.strip():
            yield number, line.rstrip("\r\n")


def _mark(lines: list[str]) -> str | None:
    """What stands between the cells of nearly all lines; None for white space."""
    marks = ("::", "\t", "|", ",", ";")
    return next((m for m in marks if lines and sum(m in line for line in lines) >= _MOST * len(lines)), None)


def _cells(line: str, mark: str | None) -> list[str]:
    return [cell.strip() for cell in line.split(mark)]


def _named_cells(cells: list[str]) -> bool:
    """Whether a line's cells are names of columns, a user's and an item's among them."""
    recipe = ItemsRecipe()
    return bool(_columns(cells, "user", recipe) and _columns(cells, "item", recipe))


@dataclass
class Layout:
    """Which cell of a line is what. Without `width` a line is a user and all items in order."""

    width: int | None
    user: int = 0
    item: int = 1
    time: int | None = None
    weight: int | None = None
    headed: bool = False  # the first line holds the columns' names


def _layout(lines: list[str], mark: str | None, recipe: ItemsRecipe) -> Layout:
    """How lines are laid out, told by a heading, else by what nearly all of them hold."""
    rows = [_cells(line, mark) for line in lines]
    widths = Counter(len(row) for row in rows)
    width, count = widths.most_common(1)[0]
    if _named_cells(rows[0]) and len(rows[0]) == width:
        place = {role: _columns(rows[0], role, recipe) for role in ("user", "item", "time", "weight")}
        columns = {role: rows[0].index(names[0]) for role, names in place.items() if names and names[0] in rows[0]}
        return Layout(width, headed=True, **columns)
    if width not in (2, 3, 4) or count < _MOST * len(rows):
        return Layout(None)
    alike = [row for row in rows if len(row) == width]
    later = alike[1:] or alike  # the first may be a heading whose names are not known
    numbers = [n for n in range(1, width) if _share(later, n, lambda cell: _time(cell) is not None) >= _MOST]
    dates = [n for n in numbers if _share(later, n, lambda cell: _number(cell) is None) >= _MOST]
    if dates:  # as in `session, time, item, category`
        others = [n for n in range(1, width) if n != dates[0]]
        weight = others[1] if len(others) > 1 and others[1] in numbers else None
        return Layout(width, item=others[0], time=dates[0], weight=weight)
    last = width - 1
    # Of three cells the last is a time where it is too large for a rating.
    large = _share(later, last, lambda cell: (_time(cell) or 0) > 10_000)
    if width == 4 or (width == 3 and last in numbers and large >= 0.5):
        return Layout(width, time=last, weight=2 if width == 4 else None)
    return Layout(width, weight=2 if width == 3 else None)


def _share(rows: list[list[str]], column: int, holds: Callable[[str], bool]) -> float:
    return sum(holds(row[column]) for row in rows) / len(rows)


def read_interactions(tree: Tree, name: str, recipe: ItemsRecipe) -> Iterator[Interaction | Rejected]:
    """The rows of a table of interactions, in the order of the file; what cannot be used is told."""
    tree.used.add(name)
    if suffix_of(name) in TABLE_SUFFIXES and not _headless(tree, name):
        yield from _from_table(tree, name, recipe)
        return
    try:
        lines = list(_lines(tree, name))
    except DAMAGED as error:
        raise_if_passing(error, name)
        raise PlaitError(f"{name} cannot be read: {error}. Fetch it again.") from error
    if not lines:
        return
    sample = [line for _, line in lines[:_SAMPLE]]
    mark = _mark(sample)
    layout = _layout(sample, mark, recipe)
    for number, line in lines[1:] if layout.headed else lines:
        cells = _cells(line, mark)
        if layout.width is None:  # a user, and all items in order
            if len(cells) < 2:
                yield Rejected(name, number, Reason(RejectKind.NO_VALUE, "a user without items"))
            for item in cells[1:]:
                yield _interaction(name, number, cells[0], item, None, None)
            continue
        if len(cells) != layout.width:
            yield Rejected(
                name,
                number,
                Reason(RejectKind.BAD_ROW, f"{len(cells)} cells, where the other lines have {layout.width}"),
            )
            continue
        time, weight = (None if n is None else cells[n] for n in (layout.time, layout.weight))
        if time == "":
            yield Rejected(name, number, Reason(RejectKind.NO_VALUE, "no time, where other rows have one"))
            continue
        yield _interaction(name, number, cells[layout.user], cells[layout.item], time, weight)


def _headless(tree: Tree, name: str) -> bool:
    """Whether a .csv or .tsv has numbers where a heading should be."""
    if suffix_of(name) not in (".csv", ".tsv"):
        return False
    first = next((line for _, line in _lines(tree, name)), "")
    return bool(first) and all(re.fullmatch(r"-?\d+(\.\d+)?", cell) for cell in _cells(first, _mark([first])))


@dataclass(frozen=True)
class DateOrder:
    """How a column writes its dates where it is not as 2026-11-24: day or month first; None where that is not clear."""

    day_first: bool | None

    @classmethod
    def of(cls, cells: Iterable[Any]) -> DateOrder:
        """What some cells of the column show: a number above 12 is a day."""
        found = [match for cell in cells if (match := _DATE.match(str(cell).strip()))]
        days, months = (any(int(match[group]) > 12 for match in found) for group in (1, 3))
        if days != months:
            return cls(days)
        return cls(True if found and not days and all(match[2] == "." for match in found) else None)

    def iso(self, text: str) -> str:
        """A date of the column as 2026-11-24, with its time; as it is where it is none."""
        if match := _YEAR_FIRST.match(text):
            return f"{match[1]}-{int(match[2]):02}-{int(match[3]):02}{match[4] or ''}"
        if self.day_first is None or not (match := _DATE.match(text)):
            return text
        day, month = (match[1], match[3]) if self.day_first else (match[3], match[1])
        return f"{match[4]}-{int(month):02}-{int(day):02}{match[5] or ''}"


def _from_table(tree: Tree, name: str, recipe: ItemsRecipe) -> Iterator[Interaction | Rejected]:
    heads = _rows_there(tree, name)
    by_role = {role: _columns(heads, role, recipe) for role in ("user", "item", "time", "weight")}
    for role in ("user", "item"):
        if not by_role[role]:
            raise PlaitError(
                f"{name} has no column of {role}s. Its columns are {', '.join(dict.fromkeys(heads))}. Name it in the "
                f"recipe: data.items.columns.{role}."
            )
    for role, names in by_role.items():
        if names and names[0] not in heads:
            raise PlaitError(
                f"{name} has no column '{names[0]}', which the recipe's data.items.columns.{role} names. Its columns "
                f"are {', '.join(dict.fromkeys(heads))}."
            )
    dates = DateOrder(None)
    if by_role["time"]:
        sample = islice(rows(tree, name), _LOOKED_AT)
        dates = DateOrder.of(row.get(by_role["time"][0]) for _, row in sample if isinstance(row, dict))
    for line, row in rows(tree, name):
        if isinstance(row, Reason):
            yield Rejected(name, line, row)
            continue
        cell = {role: row.get(names[0]) if names else None for role, names in by_role.items()}
        if isinstance(cell["time"], str):
            cell["time"] = dates.iso(cell["time"].strip())
        if by_role["time"] and cell["time"] in (None, ""):
            yield Rejected(name, line, Reason(RejectKind.NO_VALUE, "no time, where other rows have one"))
            continue
        yield _interaction(name, line, cell["user"], cell["item"], cell["time"], cell["weight"])


def _interaction(name: str, line: int, user: Any, item: Any, time: Any, weight: Any) -> Interaction | Rejected:
    for role, value in (("user", user), ("item", item)):
        if value is None or str(value).strip() == "" or (isinstance(value, float) and not math.isfinite(value)):
            return Rejected(name, line, Reason(RejectKind.NO_VALUE, f"no {role}"))
    moment = None
    if time is not None:
        moment = _time(time)
        if moment is None:
            return Rejected(
                name,
                line,
                Reason(
                    RejectKind.BAD_VALUE,
                    f"'{str(time)[:40]}' is no time that is clear: write seconds since 1970, or 2026-11-24",
                ),
            )
    size = None
    if weight not in (None, ""):
        try:
            size = float(weight)
        except (TypeError, ValueError):
            return Rejected(name, line, Reason(RejectKind.BAD_VALUE, f"'{str(weight)[:40]}' is no weight"))
    return Interaction(_id(user), _id(item), moment, size)


def _id(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _number(value: Any) -> float | None:
    """A cell as a number: an int where it is one, which a float would round above 2^53."""
    for kind in (int, float) if isinstance(value, str | int) else (float,):
        try:
            return kind(value)
        except (TypeError, ValueError):
            continue
    return None


def _time(value: Any) -> float | None:
    """A number as it is, or the seconds since 1970 of an ISO date, with their fraction; an int where there is none."""
    if isinstance(value, datetime):
        moment = value
    elif (number := _number(value)) is not None:
        usable = math.isfinite(number) and abs(number) < 2**62
        return (int(number) if number == int(number) else number) if usable else None
    else:
        try:
            moment = datetime.fromisoformat(str(value).strip())
        except ValueError:
            return None
    seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return int(seconds) if seconds == int(seconds) else seconds


# --- items ------------------------------------------------------------------------------------------------------


def read_items(tree: Tree, name: str, recipe: ItemsRecipe) -> Iterator[tuple[int, Item | Rejected]]:
    """The rows of a table of items, each with its line; images and audio clips are checked."""
    tree.used.add(name)
    if suffix_of(name) in TABLE_SUFFIXES:
        yield from _items_of_table(tree, name, recipe)
        return
    genres = [genre for genre in tree.files if genre.rpartition("/")[2] == "u.genre"]
    names = [_cells(line, "|")[0] for _, line in _lines(tree, genres[0])] if genres else _GENRES.split("|")
    tree.used.update(genres)
    for number, line in _lines(tree, name):
        if name.rpartition("/")[2].startswith("u.item"):
            cells = line.split("|")
            if len(cells) < 6 or len(cells) - 5 > len(names):
                yield (
                    number,
                    Rejected(
                        name,
                        number,
                        Reason(RejectKind.BAD_ROW, f"{len(cells)} cells; a row of u.item has {len(names) + 5}"),
                    ),
                )
                continue
            flags = zip(names, cells[5:], strict=False)
            categories = [genre for genre, flag in flags if flag == "1" and genre != "unknown"]
            item = Item(cells[0], cells[1] or None, None, categories)
        else:
            cells = line.split("::")
            if len(cells) < 2:
                yield number, Rejected(name, number, Reason(RejectKind.BAD_ROW, "not a row 'id::title::categories'"))
                continue
            item = Item(cells[0], cells[1] or None, None, _several(cells[2]) if len(cells) > 2 else [])
        yield number, _dated(item)


def _items_of_table(tree: Tree, name: str, recipe: ItemsRecipe) -> Iterator[tuple[int, Item | Rejected]]:
    heads = list(dict.fromkeys(_rows_there(tree, name)))
    roles = ("id", "title", "text", "categories", "image", "audio")
    by_role = {role: _columns(heads, role, recipe) for role in roles}
    missing = [(role, column) for role, names in by_role.items() for column in names if column not in heads]
    if missing or not by_role["id"]:
        role, column = missing[0] if missing else ("id", "of ids")
        raise PlaitError(
            f"{name} has no column {column if column == 'of ids' else repr(column)}. Its columns are "
            f"{', '.join(heads)}. Name it in the recipe: data.items.columns.{role}."
        )
    taken = {column for names in by_role.values() for column in names}
    for line, row in rows(tree, name):
        if isinstance(row, Reason):
            yield line, Rejected(name, line, row)
            continue
        cell = {role: [row.get(column) for column in names] for role, names in by_role.items()}
        if cell["id"][0] in (None, ""):
            yield line, Rejected(name, line, Reason(RejectKind.NO_VALUE, "the item's id is empty"))
            continue
        item = Item(
            _id(cell["id"][0]),
            " ".join(str(value) for value in cell["title"] if value not in (None, "")) or None,
            " ".join(" ".join(_several(value, ("\n",))) for value in cell["text"]) or None,
            [part for value in cell["categories"] for part in _several(value)],
            more={key: value for key, value in row.items() if key not in taken and _scalar(value)},
        )
        fault = next((f for t in (item.id, item.title, item.text) if t and (f := text_fault(t))), None)
        for role, kind in (("image", "image"), ("audio", "audio")):
            if cell[role] and cell[role][0] not in (None, "") and fault is None:
                data = _medium(tree, name, cell[role][0], kind)
                if isinstance(data, Rejected):  # what else is known of the item is worth keeping
                    yield (
                        line,
                        Rejected(name, line, Reason(data.kind, f"{data.reason}; the item is kept without its {role}")),
                    )
                else:
                    setattr(item, role, data)
        yield line, Rejected(name, line, fault) if fault else _dated(item)


def _scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value == value


def _several(value: Any, marks: tuple[str, ...] = ("|", ";", ",")) -> list[str]:
    """The values of a cell: a list, or a text with marks between them."""
    if value is None:
        return []
    if isinstance(value, list):
        return [str(part).strip() for part in value if str(part).strip()]
    mark = next((m for m in marks if m in str(value)), None)
    parts = (part.strip() for part in (str(value).split(mark) if mark else [str(value)]))
    return [part for part in parts if part and part != "(no genres listed)"]


def _dated(item: Item) -> Item:
    """With the year that ends the title as a cell of its own, for conditions."""
    match = re.search(r"\((\d{4})\)\s*$", item.title or "")
    if match and "year" not in item.more:
        item.more["year"] = int(match[1])
    elif isinstance(year := item.more.get("year"), str) and year.isdigit():
        item.more["year"] = int(year)
    return item


def _medium(tree: Tree, table: str, value: Any, kind: str) -> bytes | Rejected:
    """The bytes of an image or an audio clip that a cell names or holds, once they were seen to decode."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        data = value
    else:
        resolved = tree.resolve(table, str(value))
        if isinstance(resolved, Rejected):
            return resolved
        tree.used.add(resolved)
        data = read_bytes(tree.files[resolved])
    try:
        MEDIA[kind].check(data)
    except MediaError as error:
        return Rejected(table, None, error.reason)
    return data
