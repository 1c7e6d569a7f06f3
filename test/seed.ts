import fc from 'fast-check'

// Every property of one run starts from the seed that `npm test` prints; FLEETKEY_SEED runs it again.
const seed = process.env['FLEETKEY_SEED']
if (seed !== undefined) fc.configureGlobal({ seed: Number(seed) | 0 })
