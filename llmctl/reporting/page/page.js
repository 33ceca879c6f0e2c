// Two conveniences; without them the page says the same. Texts go in as text, never as markup.
"use strict";

// Pointing at a chart shows the step and its values, in every chart that stands beside it.
for (const group of document.querySelectorAll(".charts")) {
  const charts = [...group.querySelectorAll(".chart")].map((figure) => ({
    plot: figure.querySelector(".plot"),
    cursor: figure.querySelector(".cursor"),
    readout: figure.querySelector(".readout"),
    note: figure.querySelector(".readout").textContent,
    lines: JSON.parse(figure.querySelector("script").textContent),
  }));
  const nearest = (at, share) =>
    at.reduce((best, place, i) => (Math.abs(place - share) < Math.abs(at[best] - share) ? i : best), 0);
  const show = (share) => {
    for (const { cursor, readout, lines } of charts) {
      const found = lines.map((line) => ({ line, i: nearest(line.at, share) }));
      const first = found[0];
      cursor.style.left = `${100 * first.line.at[first.i]}%`;
      const values = found.map(({ line, i }) => (lines.length > 1 ? `${line.name} ${line.y[i]}` : line.y[i]));
      readout.textContent = `step ${first.line.x[first.i].toLocaleString("en")} · ${values.join(" · ")}`;
    }
    group.classList.add("pointed");
  };
  const clear = () => {
    group.classList.remove("pointed");
    for (const { readout, note } of charts) readout.textContent = note;
  };
  for (const { plot } of charts) {
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      show(Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)));
    });
    plot.addEventListener("pointerleave", clear);
  }
}

// The slider moves the middle row of the samples through all steps.
for (const scrub of document.querySelectorAll(".scrub")) {
  const slider = scrub.querySelector("input");
  const told = JSON.parse(scrub.querySelector("script").textContent);
  if (!slider) continue;
  scrub.classList.add("live");
  slider.addEventListener("input", () => {
    const step = Number(slider.value);
    scrub.querySelector("output").textContent = told.names[step];
    scrub.querySelectorAll(".scrubbed").forEach((row, i) => {
      row.querySelector("small").textContent = told.names[step];
      row.querySelector("p").textContent = told.texts[step][i];
    });
  });
}
