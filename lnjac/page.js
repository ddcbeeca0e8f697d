"use strict";
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
    views[id] = (await vegaEmbed(document.getElementById(id), { ...spec, datasets: own }, options)).view;
  }

  // A cell of a map, or the two lists beside it, choose what the curves show.
  for (const part of document.querySelectorAll("[data-linked]")) {
    const lists = Object.fromEntries([...part.querySelectorAll("select")].map((list) => [list.name, list]));
    const curves = part.querySelector("[data-curves]");
    const body = part.querySelector("[data-rows] tbody");
    const said = part.querySelector("[data-said]");
    const linked = [...part.querySelectorAll(".chart")].map((chart) => views[chart.id]);
    const number = (value) => (value === null ? "–" : Number(value.toPrecision(4)).toString());

    const show = async () => {
      const { site, metric } = Object.fromEntries(Object.entries(lists).map(([name, list]) => [name, list.value]));
      await Promise.all(linked.map((view) => view.signal("site", site).signal("metric", metric).runAsync()));
      const chosen = rows[curves.dataset.curves].filter((row) => row.site === site && row.metric === metric);
      said.textContent = `${metric} at ${site}`;
      body.replaceChildren(
        ...chosen.map((row) => {
          const line = document.createElement("tr");
          for (const key of ["step", "level", "mean", "low", "high"]) {
            line.insertCell().textContent = typeof row[key] === "string" ? row[key] : number(row[key]);
          }
          return line;
        }),
      );
    };
    for (const view of linked) {
      view.addEventListener("click", (_, item) => {
        if (!item?.datum?.shown) return;
        lists.site.value = item.datum.site;
        lists.metric.value = item.datum.metric;
        show();
      });
    }
    for (const list of Object.values(lists)) list.addEventListener("change", show);
    await show();
  }
  document.documentElement.dataset.ready = "yes";
})().catch((error) => {
  document.getElementById("broken").hidden = false;
  throw error;
});
