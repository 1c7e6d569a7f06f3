-- Where each certificate stands in the calendar, and what each device trusts; counts of rows by value, kept with the rows.
ALTER TABLE "certificate" ADD COLUMN "calendar" TEXT;
UPDATE "certificate" SET "calendar" = index_value('certificate', 'calendar', "row");
CREATE INDEX "certificate_calendar" ON "certificate" ("calendar", "id");

ALTER TABLE "device" ADD COLUMN "acknowledged" TEXT;
UPDATE "device" SET "acknowledged" = index_value('device', 'acknowledged', "row");
CREATE INDEX "device_acknowledged" ON "device" ("acknowledged", "id");

CREATE TABLE "tally" (
  "table" TEXT NOT NULL,
  "field" TEXT NOT NULL,
  "value" TEXT NOT NULL,
  "rows" INTEGER NOT NULL,
  PRIMARY KEY ("table", "field", "value")
) STRICT, WITHOUT ROWID;
INSERT INTO "tally" SELECT 'certificate', 'calendar', tally_value('certificate', 'calendar', "calendar") AS "day", count(*) FROM "certificate" WHERE "calendar" IS NOT NULL GROUP BY "day";
INSERT INTO "tally" SELECT 'device', 'acknowledged', "acknowledged", count(*) FROM "device" WHERE "acknowledged" IS NOT NULL GROUP BY "acknowledged";
INSERT INTO "tally" SELECT 'device', 'state', "state", count(*) FROM "device" WHERE "state" IS NOT NULL GROUP BY "state";
