"use strict";
(async () => {
  const bytes = Uint8Array.from(atob(document.getElementById("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const { charts, datasets, narrow } = await new Response(stream).json();

  const rows = Object.fromEntries(
    Object.entries(datasets).map(([name, columns]) => {
      const keys = Object.keys(columns);
      const length = keys.length ? columns[keys[0]].length : 0;
      return [name, Array.from({ length }, (_, i) => Object.fromEntries(keys.map((key) => [key, columns[key][i]])))];
    }),
  );
  const options = {
    ast: true, // expressions are interpreted: the policy allows no eval
    renderer: "svg",
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
    config: innerWidth < 600 ? narrow : {},
  };

  // What is chosen is in the lists, in the address, and in the parameters of the charts that know it.
  const lists = [...document.querySelectorAll("select")];
  const chosen = Object.fromEntries(lists.map(({ name, value }) => [name, value]));
  const knows = (list, value) => [...list.options].some((option) => option.value === value);
  const choose = (wanted) => {
    for (const list of lists) {
      if (list.name in wanted && knows(list, wanted[list.name])) list.value = chosen[list.name] = wanted[list.name];
    }
  };
  const fromAddress = () => choose(Object.fromEntries(new URLSearchParams(location.hash.slice(1))));
  fromAddress();

  const drawn = [];
  for (const [id, chart] of Object.entries(charts)) {
    const place = document.getElementById(id);
    const own = Object.fromEntries(Object.entries(chart.uses).map(([name, of]) => [name, rows[of]]));
    const { view } = await vegaEmbed(place, { ...chart.spec, datasets: own }, options);
    place.querySelector("svg").setAttribute("aria-hidden", "true"); // the caption and the table are read, not each mark
    const shown = Object.fromEntries(Object.entries(chart.choices).map(([name, values]) => [name, values[0]]));
    const marks = (chart.spec.params ?? []).map(({ name }) => name).filter((name) => !(name in shown));
    drawn.push({ view, shown, marks, choices: chart.choices, table: place.closest("figure").querySelector("table") });
  }

  const number = (value) => {
    if (value === null) return "–";
    return Number.isInteger(value) || Math.abs(value) >= 1000 ? value.toFixed(0) : value.toPrecision(4);
  };
  const cell = (row, key) => {
    if (key === "interval") return row.low === null ? "–" : `${number(row.low)} to ${number(row.high)}`;
    return typeof row[key] === "number" || row[key] === null ? number(row[key]) : String(row[key]);
  };
  const fill = ({ table, shown }) => {
    const heads = [...table.querySelectorAll("th")];
    const most = Number(document.body.dataset.most);
    const found = rows[table.dataset.rows].filter((row) =>
      Object.entries(shown).every(([name, value]) => !row[name] || row[name] === value),
    );
    table.tBodies[0].replaceChildren(
      ...found.slice(0, most).map((row) => {
        const line = document.createElement("tr");
        for (const head of heads) {
          const one = line.insertCell();
          one.textContent = cell(row, head.textContent);
          one.className = head.className;
        }
        return line;
      }),
    );
    const left = table.closest("details").querySelector("[data-left]");
    left.hidden = found.length <= most;
    left.textContent = `${found.length - most} more rows are left out here.`;
  };

  // A chart that does not know what is chosen keeps what it shows.
  const show = () =>
    Promise.all(
      drawn.map(async (chart) => {
        let changed = false;
        for (const [name, values] of Object.entries(chart.choices)) {
          if (!(name in chosen) || chart.shown[name] === chosen[name] || !values.includes(chosen[name])) continue;
          chart.view.signal(name, (chart.shown[name] = chosen[name]));
          changed = true;
        }
        for (const name of chart.marks) if (name in chosen) chart.view.signal(name, chosen[name]);
        if (changed) fill(chart);
        if (changed || chart.marks.length) await chart.view.runAsync();
      }),
    );
  for (const list of lists) {
    list.addEventListener("change", () => {
      chosen[list.name] = list.value;
      history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
      show();
    });
  }
  for (const { view, marks } of drawn.filter(({ marks }) => marks.length)) {
    view.addEventListener("click", (_, item) => {
      if (!item?.datum?.shown) return;
      choose(Object.fromEntries(marks.map((name) => [name, item.datum[name]])));
      history.replaceState(null, "", `#${new URLSearchParams(chosen)}`);
      show();
    });
  }
  // A link to a detail unfolds it.
  const arrive = () => {
    if (location.hash.includes("=")) return fromAddress();
    for (let at = document.getElementById(location.hash.slice(1)); at; at = at.parentElement) {
      if (at.tagName === "DETAILS") at.open = true;
    }
  };
  addEventListener("hashchange", () => {
    arrive();
    show();
  });
  arrive();

  const save = (text, type, name) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const quoted = (value) => {
    if (typeof value !== "string") return value ?? "";
    // a spreadsheet would run a text that begins like a formula
    return `"${(/^[=+\-@\t\r]/.test(value) ? `'${value}` : value).replaceAll('"', '""')}"`;
  };
  for (const button of document.querySelectorAll("[data-csv]")) {
    const table = datasets[button.dataset.csv];
    const keys = Object.keys(table);
    button.disabled = false;
    button.addEventListener("click", () => {
      const lines = rows[button.dataset.csv].map((row) => keys.map((key) => quoted(row[key])).join(","));
      save([keys.map(quoted).join(","), ...lines, ""].join("\n"), "text/csv", `${button.dataset.name}.csv`);
    });
  }
  for (const button of document.querySelectorAll("[data-svg]")) {
    const { view } = drawn[Object.keys(charts).indexOf(button.dataset.svg)];
    button.disabled = false;
    button.addEventListener("click", async () => {
      const style = getComputedStyle(document.documentElement);
      const svg = (await view.toSVG()).replace(/"var\((--[\w-]+)\)"/g, (_, name) => `"${style.getPropertyValue(name)}"`);
      save(svg, "image/svg+xml", `${button.dataset.name}.svg`);
    });
  }
  await show();
  document.documentElement.dataset.ready = "yes";
})().catch((error) => {
  document.getElementById("broken").hidden = false;
  throw error;
});
