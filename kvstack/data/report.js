"use strict";
// A click on a header sorts its table: up, then down. Numbers sort by size, text by its words; what has no key is last.
for (const table of document.querySelectorAll("table")) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      const key = (row) => row.cells[column].dataset.key;
      const order = (one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");
        const [x, y] = [a, b].map((text) => Number(text.replace(/^(-?)inf$/, "$1Infinity")));
        const sign = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : Math.sign(x - y) || 0;
        return up ? sign : -sign;
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
