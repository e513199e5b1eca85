"use strict";
// Sorting and filtering of tables. Without this script they are whole, only in one order.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => { const c = row.cells[i], s = c.dataset.sort; return s === undefined ? c.textContent.trim().toLowerCase() : s === "" ? null : Number(s); };
  const compare = (a, b) => a === b ? 0 : a === null || a === "" ? 1 : b === null || b === "" ? -1 : typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
      heads.forEach(h => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const empty = v => v === null || v === "";
      rows.sort((a, b) => { const x = key(a, i), y = key(b, i); return empty(x) || empty(y) ? compare(x, y) : sign * compare(x, y); });
      body.append(...rows);
    });
  });
  const tools = document.querySelector(`[data-for="${table.id}"]`);
  if (!tools) continue;
  tools.hidden = false;
  const said = tools.querySelector("[role=status]"), inputs = [...tools.querySelectorAll("input, select")];
  const filter = () => {
    let n = 0;
    for (const row of rows) {
      row.hidden = !inputs.every(f => f.dataset.column ? !f.value || row.dataset[f.dataset.column] === f.value
        : f.value.toLowerCase().split(/\s+/).every(w => row.textContent.toLowerCase().includes(w)));
      n += !row.hidden;
    }
    said.textContent = n === rows.length ? `${n} rows` : `${n} of ${rows.length} rows`;
  };
  inputs.forEach(f => f.addEventListener("input", filter));
  filter();
}
