"use strict";
const grid = document.getElementById("map");
if (grid) {
  const said = document.getElementById("said");
  const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells]);
  const isStop = (cell) => cell !== undefined && cell.hasAttribute("tabindex");
  const tell = (cell) => { said.textContent = cell.dataset.said; };
  const place = (cell) => {
    const row = rows.findIndex((cells) => cells.includes(cell));
    return [row, rows[row].indexOf(cell)];
  };
  const goTo = (cell) => {
    grid.querySelector('td[tabindex="0"]').tabIndex = -1;
    cell.tabIndex = 0;
    cell.focus();
  };
  // The nearest stop in a direction; a column may have gaps, so that a row's nearest cell is taken there.
  const along = (row, column, down, right) => {
    for (let r = row + down, c = column + right; rows[r] && (right === 0 || rows[r][c]); r += down, c += right) {
      if (isStop(rows[r][c])) return rows[r][c];
      if (down) {
        const others = rows[r].filter(isStop);
        if (others.length) return others.reduce((a, b) =>
          Math.abs(rows[r].indexOf(a) - column) <= Math.abs(rows[r].indexOf(b) - column) ? a : b);
      }
    }
    return null;
  };
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  grid.addEventListener("keydown", (event) => {
    if (!isStop(event.target) || event.altKey || event.metaKey) return;
    const [row, column] = place(event.target);
    let next = null;
    if (event.key in steps) next = along(row, column, ...steps[event.key]);
    else if (event.key === "Home" || event.key === "End") {
      const stops = (event.ctrlKey ? rows.flat() : rows[row]).filter(isStop);
      next = event.key === "Home" ? stops[0] : stops[stops.length - 1];
    } else return;
    event.preventDefault();
    if (next) goTo(next);
  });
  grid.addEventListener("focusin", (event) => { if (isStop(event.target)) tell(event.target); });
  grid.addEventListener("mouseover", (event) => {
    const cell = event.target.closest("td");
    if (isStop(cell ?? undefined)) tell(cell);
  });
  grid.addEventListener("click", (event) => {
    const cell = event.target.closest("td");
    if (isStop(cell ?? undefined)) goTo(cell);
  });
}
