"use strict";

// Sorting: a heading's button sorts by its column, and once more the other way round. Cells without a number stay last.
const said = document.getElementById("said");
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const numeric = heading.classList.contains("number");
    const button = heading.querySelector("button");
    button.addEventListener("click", () => {
      const descending = heading.getAttribute("aria-sort") === "ascending";
      const keyed = [...body.rows].map((row) => ({ row, key: row.cells[column].dataset.sort }));
      keyed.sort((a, b) => {
        if (a.key === "" || b.key === "") return (a.key === "") - (b.key === "");
        const order = numeric ? Number(a.key) - Number(b.key) : a.key.localeCompare(b.key, "en", { numeric: true });
        return descending ? -order : order;
      });
      body.append(...keyed.map(({ row }) => row));
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      said.textContent = `Sorted by ${button.getAttribute("aria-label") || button.textContent.trim()}, ${descending ? "descending" : "ascending"}`;
    });
  });
}

// Light or dark: what the system prefers, until the button says otherwise.
const theme = document.getElementById("theme");
const preferred = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.dataset.theme ?? (preferred.matches ? "dark" : "light")) === "dark";
const showTheme = () => theme.setAttribute("aria-pressed", String(isDark()));
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
preferred.addEventListener("change", showTheme);
showTheme();

// What is wider than the screen scrolls, by keyboard too.
const scrollable = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
document.querySelectorAll(".scroll").forEach((region) => scrollable.observe(region));
