/** TCG TPM Vendor ID Registry, family 2.0: four bytes of ASCII, padded with zeros. */
const names = [
  'AMD',
  'ANT',
  'ATML',
  'BRCM',
  'CSCO',
  'FLYS',
  'GOOG',
  'HISI',
  'HPE',
  'HPI',
  'IBM',
  'IFX',
  'INTC',
  'LEN',
  'MSFT',
  'NSG',
  'NSM',
  'NTC',
  'NTZ',
  'NVDA',
  'QCOM',
  'ROCC',
  'SEAL',
  'SECE',
  'SMSC',
  'SMSN',
  'SNS',
  'STM',
  'TXN',
  'WEC',
] as const

/** `id:49465800` for `IFX`, as EK certificates name it (TCG EK credential profile §3.1.2). */
export const manufacturerId = (name: string): string => `id:${Buffer.from(name.padEnd(4, '\0'), 'latin1').toString('hex').toUpperCase()}`

export const registeredManufacturers: ReadonlySet<string> = new Set(names.map(manufacturerId))
