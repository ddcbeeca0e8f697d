"use strict";
// Paper has no folds: what the style sheet unfolds in newer browsers is opened for the older ones.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open])")) {
    fold.open = true;
    addEventListener("afterprint", () => (fold.open = false), { once: true });
  }
});
(async () => {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const { charts, datasets } = await new Response(stream).json();

  const rows = Object.fromEntries(
    Object.entries(datasets).map(([name, columns]) => {
      const keys = Object.keys(columns);
      return [name, columns[keys[0]].map((_, i) => Object.fromEntries(keys.map((key) => [key, columns[key][i]])))];
    }),
  );
  const options = {
    ast: true, // expressions are interpreted: the policy allows no eval
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  };
  const views = {};
  for (const [id, { spec, uses }] of Object.entries(charts)) {
    const own = Object.fromEntries(uses.map((name) => [name, rows[name]]));
    const place = document.getElementById(id);
    views[id] = (await vegaEmbed(place, { ...spec, datasets: own }, options)).view;
    place.querySelector("svg").setAttribute("aria-hidden", "true"); // the caption and the table are read, not each mark
  }
  const number = (value) => {
    if (value === null) return "–";
    return Number.isInteger(value) || Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(4);
  };

  // Lists beside the charts set the parameters of their names; so does a click on a cell of a map.
  for (const part of document.querySelectorAll("[data-linked]")) {
    const lists = [...part.querySelectorAll("select")];
    const filled = part.querySelector("[data-rows]");
    const linked = [...part.querySelectorAll(".chart")].map(({ id }) => ({
      view: views[id],
      names: (charts[id].spec.params ?? []).map((parameter) => parameter.name),
    }));

    const show = async () => {
      const known = linked.map(({ view, names }) => {
        for (const { name, value } of lists) if (names.includes(name)) view.signal(name, value);
        return view.runAsync();
      });
      if (filled) fill();
      await Promise.all(known);
    };
    const fill = () => {
      const keys = [...filled.querySelectorAll("th")].map((head) => head.textContent);
      const chosen = rows[filled.dataset.rows].filter((row) =>
        lists.every(({ name, value }) => !(name in row) || row[name] === value),
      );
      part.querySelector("[data-said]").textContent = lists.map(({ value }) => value).join(", ");
      filled.querySelector("tbody").replaceChildren(
        ...chosen.map((row) => {
          const line = document.createElement("tr");
          for (const key of keys) {
            line.insertCell().textContent = typeof row[key] === "string" ? row[key] : number(row[key]);
          }
          return line;
        }),
      );
    };
    for (const { view } of linked) {
      view.addEventListener("click", (_, item) => {
        const cell = item?.datum;
        if (!cell?.shown) return;
        for (const list of lists) {
          if ([...list.options].some((option) => option.value === cell[list.name])) list.value = cell[list.name];
        }
        show();
      });
    }
    for (const list of lists) list.addEventListener("change", show);
    await show();
  }
  document.documentElement.dataset.ready = "yes";
})().catch((error) => {
  document.getElementById("broken").hidden = false;
  throw error;
});
