// The page reads the same without this script; it sorts tables, opens what is printed, and marks where the reader is.
"use strict";

const text = cell => cell.dataset.v ?? cell.textContent.trim();

function value(cell) {
  const found = text(cell).replace("\u2212", "-").match(/^[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?(?=[\s%]|$)/);
  return found ? parseFloat(found[0].replaceAll(",", "")) : NaN;
}

function sort(table, column, header) {
  const before = header.getAttribute("aria-sort");
  const rows = [...table.tBodies].flatMap(body => [...body.rows]).filter(row => row.cells.length > column);
  const cells = rows.map(row => row.cells[column]).filter(cell => !["", "–"].includes(text(cell)));
  const numeric = 2 * cells.filter(cell => !isNaN(value(cell))).length > cells.length;  // words among numbers come last
  const down = before ? before === "ascending" : numeric;  // numbers begin with the largest
  for (const h of table.tHead.rows[0].cells) h.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]], [none, other] = [x, y].map(c => numeric ? isNaN(value(c)) : ["", "–"].includes(text(c)));
    if (none || other) return none - other;
    const ascending = numeric ? value(x) - value(y) : text(x).localeCompare(text(y), undefined, {numeric: true});
    return down ? -ascending : ascending;
  };
  for (const body of table.tBodies) {
    const movable = [...body.rows].filter(row => row.cells.length > column);
    body.append(...movable.sort(order));
  }
}

for (const table of document.querySelectorAll("table:not(.fixed)")) {
  if (!table.tHead || [...table.tBodies].reduce((n, body) => n + body.rows.length, 0) < 3) continue;
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    if (!header.textContent.trim()) return;
    const button = document.createElement("button");
    button.append(...header.childNodes);
    button.title = "sort";
    button.onclick = () => sort(table, column, header);
    header.append(button);
  });
}

// A box that has nothing to scroll is no stop for the keyboard.
const boxes = () => document.querySelectorAll(".scroll").forEach(box => {
  box.scrollWidth > box.clientWidth ? box.setAttribute("tabindex", 0) : box.removeAttribute("tabindex");
});
addEventListener("resize", boxes);
document.addEventListener("toggle", boxes, true);
boxes();

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach(part => part.open = true);
});
addEventListener("afterprint", () => opened.forEach(part => part.open = false));

const links = new Map([...document.querySelectorAll("nav a")].map(link => [link.hash.slice(1), link]));
const seen = new IntersectionObserver(entries => {
  for (const entry of entries.filter(e => e.isIntersecting)) {
    links.forEach(link => link.removeAttribute("aria-current"));
    links.get(entry.target.id).setAttribute("aria-current", "true");
  }
}, {rootMargin: "-5% 0px -80% 0px"});
links.forEach((_, id) => { const target = document.getElementById(id); if (target) seen.observe(target); });
