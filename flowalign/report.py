"""draft"""
def write_report(folders, path):
    return path
