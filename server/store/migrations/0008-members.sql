-- Members of groups, counted with the rows.
INSERT INTO "tally" SELECT 'member', 'group', "group", count(*) FROM "member" WHERE "group" IS NOT NULL GROUP BY "group";
