"use strict";
(() => {
  // Tables: a button in each column's head sorts, a third press restores the order.
  const valueOf = (cell) => {
    const value = cell.dataset.value;
    return value === undefined ? cell.textContent.trim().toLowerCase() : Number(value);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b
      : typeof a === "number" ? -1 : typeof b === "number" ? 1
        : a.localeCompare(b, undefined, { numeric: true });

  for (const table of document.querySelectorAll("table[data-sort]")) {
    const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    const body = table.tBodies[0];
    const original = [...body.rows];
    const order = document.createElement("label");
    const select = document.createElement("select");
    const sort = (place, direction) => {
      heads.forEach((head, i) => {
        head.setAttribute("aria-sort", i === place ? direction : "none");
        head.querySelector(".sort").textContent =
          i !== place || direction === "none" ? "↕" : direction === "ascending" ? "▲" : "▼";
      });
      const rows = [...original];
      if (direction !== "none") {
        const sign = direction === "ascending" ? 1 : -1;
        rows.sort((a, b) => sign * compare(valueOf(a.cells[place]), valueOf(b.cells[place])));
      }
      body.append(...rows);
      select.value = direction === "none" ? "" : `${place} ${direction}`;
    };
    select.append(new Option("as it is", ""));
    heads.forEach((head, place) => {
      const name = head.textContent.trim() || "name";
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = "↕";
      button.setAttribute("aria-label", `sort by ${name}`);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      head.addEventListener("click", (event) => {
        if (event.target.closest("a")) return;
        const now = head.getAttribute("aria-sort");
        const numbers = original.some((row) => row.cells[place]?.dataset.value !== undefined);
        const first = numbers ? "descending" : "ascending";
        const second = numbers ? "ascending" : "descending";
        sort(place, now === "none" ? first : now === first ? second : "none");
      });
      select.append(new Option(`${name} ▼`, `${place} descending`));
      select.append(new Option(`${name} ▲`, `${place} ascending`));
    });
    select.addEventListener("change", () => {
      const [place, direction] = select.value.split(" ");
      sort(Number(place), direction ?? "none");
    });
    order.className = "order";
    order.append("sorted by", select);
    table.parentElement.before(order);
  }

  // Terms: their meaning beside them, on hover, on focus and on touch.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  const hide = () => { tip.hidden = true; };
  for (const term of document.querySelectorAll("a.term")) {
    const said = term.title;
    term.removeAttribute("title");
    term.setAttribute("aria-description", said);
    const show = () => {
      tip.textContent = said;
      tip.hidden = false;
      const at = term.getBoundingClientRect();
      const left = Math.min(at.left, innerWidth - tip.offsetWidth - 12);
      const below = at.bottom + 8 + tip.offsetHeight < innerHeight;
      tip.style.left = `${Math.max(12, left)}px`;
      tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - tip.offsetHeight - 8)}px`;
    };
    term.addEventListener("pointerenter", show);
    term.addEventListener("pointerleave", hide);
    term.addEventListener("focus", show);
    term.addEventListener("blur", hide);
    // Where nothing hovers, the first touch explains; the glossary is one more touch away.
    term.addEventListener("click", (event) => {
      if (matchMedia("(hover: none)").matches && term.dataset.shown === undefined) {
        event.preventDefault();
        term.dataset.shown = "";
        show();
        return;
      }
      delete term.dataset.shown;
      hide();
    });
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // Browsers that cannot show folded parts in print by style have them opened.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const part of folded) part.open = true;
  });
  addEventListener("afterprint", () => { for (const part of folded) part.open = false; });
})();
