// A click on a column's name sorts the table by it: numbers greatest first, words from a to z; again turns it round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const isNumber = head.classList.contains("number");
    const [first, second] = isNumber ? ["descending", "ascending"] : ["ascending", "descending"];
    const order = head.getAttribute("aria-sort") === first ? second : first;
    const sign = order === "ascending" ? 1 : -1;
    const key = row => row.cells[column].dataset.key;
    const text = row => row.cells[column].textContent;
    const missing = row => isNumber && key(row) === undefined;
    const compare = (a, b) =>
      isNumber ? key(a) - key(b) : text(a).localeCompare(text(b), undefined, {numeric: true});
    const rows = [...body.rows].filter(row => !missing(row)).sort((a, b) => sign * compare(a, b));
    heads.forEach(each => each.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    body.append(...rows, ...[...body.rows].filter(missing));
  }));
}

// Paper cannot be unfolded; what was folded is so again afterwards.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  folded.forEach(each => { each.open = true; });
});
addEventListener("afterprint", () => folded.forEach(each => { each.open = false; }));
