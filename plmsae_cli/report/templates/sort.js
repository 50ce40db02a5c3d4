"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const keyed = [...body.rows].map((row) => {
        const cell = row.cells[column];
        const raw = cell.dataset.sort;
        return { row, value: raw ? Number(raw) : NaN, text: cell.textContent };
      });
      keyed.sort((a, b) => {
        const gaps = Number.isNaN(a.value) - Number.isNaN(b.value);
        if (gaps) return gaps;
        return sign * (Number.isNaN(a.value) ? a.text.localeCompare(b.text) : a.value - b.value);
      });
      body.append(...keyed.map((each) => each.row));
    });
  });
}
