// A table of any length: only the rows in sight are elements, two spacers stand for the rest.

const ROW = 34;
const NARROW = { latent: 66, density: 80, concept_f1: 56 }; // on a phone the name of the concept gets the rest

class LongTable {
  /** columns: [{key, name, num, width, wide, text(latent), node(latent)}]; open(latent). */
  constructor({ label, columns, sort, resort, open }) {
    const narrow = phone.matches;
    columns = columns.filter((column) => !narrow || !column.wide).map((column) => (narrow && column.width ? { ...column, width: NARROW[column.key] || 84 } : column));
    Object.assign(this, { columns, open });
    this.rows = [];
    this.at = -1;
    const heads = columns.map((column) =>
      h(`th${column.num ? ".num" : ""}`, { scope: "col", "aria-sort": sort.key === column.key ? (sort.down ? "descending" : "ascending") : "none" },
        h("button", { type: "button", onclick: () => resort(column.key) }, column.name)));
    this.body = h("tbody");
    this.caption = h("caption.hidden", null, label);
    this.table = h("table", null, this.caption,
      h("colgroup", null, columns.map((column) => h(`col`, { width: column.width || null }))),
      h("thead", null, h("tr", { "aria-rowindex": 1 }, heads)), this.body);
    this.element = h("div.table", { tabindex: 0, role: "region", "aria-label": label }, this.table);
    this.element.addEventListener("scroll", () => this.draw());
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.element);
  }

  update(rows) {
    this.rows = rows;
    this.at = Math.min(this.at, rows.length - 1);
    this.table.setAttribute("aria-rowcount", rows.length + 1);
    this.first = null;
    this.draw();
  }

  draw() {
    const height = this.element.clientHeight || 600;
    const first = Math.max(0, Math.floor(this.element.scrollTop / ROW) - 8);
    const last = Math.min(this.rows.length, first + Math.ceil(height / ROW) + 18);
    if (first === this.first && last === this.last) return;
    [this.first, this.last] = [first, last];
    const space = (rows) => h("tr.space", { "aria-hidden": "true" }, h("td", { colspan: this.columns.length, height: rows * ROW }));
    replace(this.body, first > 0 && space(first), this.rows.slice(first, last).map((latent, i) => this.row(latent, first + i)), last < this.rows.length && space(this.rows.length - last));
  }

  row(latent, place) {
    const cells = this.columns.map((column) => h(`td${column.num ? ".num" : ""}`, column.text ? { title: column.num ? null : column.text(latent) } : null, column.node ? column.node(latent) : column.text(latent)));
    return h(`tr${place === this.at ? ".at" : ""}`, { "aria-rowindex": place + 2, onclick: (event) => { if (!event.target.closest("a")) this.open(latent); } }, cells);
  }

  /** Marks the row so many places on, and brings it into sight. */
  step(by) {
    if (!this.rows.length) return;
    this.at = Math.max(0, Math.min(this.rows.length - 1, this.at + by));
    const top = this.at * ROW;
    const room = this.element.clientHeight - 36 - ROW;
    if (top < this.element.scrollTop) this.element.scrollTop = top;
    else if (top > this.element.scrollTop + room) this.element.scrollTop = top - room;
    this.first = null;
    this.draw();
    announce(`latent ${this.rows[this.at]}`);
  }
}
