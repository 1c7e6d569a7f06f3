-- Targets of campaigns and holdings of epochs by stage, counted with the rows.
INSERT INTO "tally" SELECT 'target', 'place', "place", count(*) FROM "target" WHERE "place" IS NOT NULL GROUP BY "place";
INSERT INTO "tally" SELECT 'holding', 'place', "place", count(*) FROM "holding" WHERE "place" IS NOT NULL GROUP BY "place";
